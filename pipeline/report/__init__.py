"""One self-contained page per run: what it learned, how well it drafts, how fast it decodes."""
