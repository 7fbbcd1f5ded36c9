"""What a run needs before its first step and around it: folder, identity, checks, signals."""
