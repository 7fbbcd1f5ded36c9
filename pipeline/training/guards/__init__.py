"""Guards may act on a run: refuse a step, ask for a rollback, end a stuck process."""
