"""Code benchmarks: HumanEval, HumanEval+, MBPP, MBPP+, and the sandbox that runs the answers."""
