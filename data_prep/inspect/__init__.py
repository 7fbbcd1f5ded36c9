"""Looking at a prepared folder: does it hold what its manifest says, and how does it look."""
