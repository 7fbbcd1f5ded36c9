// Plays the generation forward by forward. Without scripts the page shows all of it at once.
(() => {
  const player = document.getElementById("player");
  if (!player) return;
  const forwards = [...document.querySelectorAll("#generation .forward")];
  const bars = [...document.querySelectorAll(".strip .bar")];
  const scrub = document.getElementById("scrub");
  const play = document.getElementById("play");
  const shown = document.getElementById("shown");
  let timer = null;

  function show(count) {
    scrub.value = count;
    let tokens = 0;
    forwards.forEach((forward, index) => {
      forward.classList.toggle("pending", index >= count);
      if (index < count) tokens += forward.childElementCount;
    });
    bars.forEach((bar, index) => bar.classList.toggle("pending", index >= count));
    shown.textContent = `${count} forwards, ${tokens} tokens`;
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  play.addEventListener("click", () => {
    if (timer) return stop();
    if (Number(scrub.value) >= forwards.length) show(0);
    play.textContent = "Pause";
    timer = setInterval(() => {
      show(Number(scrub.value) + 1);
      if (Number(scrub.value) >= forwards.length) stop();
    }, 250);
  });
  scrub.addEventListener("input", () => {
    stop();
    show(Number(scrub.value));
  });
  player.hidden = false;
  show(forwards.length);
})();
