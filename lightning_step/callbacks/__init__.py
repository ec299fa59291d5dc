"""Lightning callbacks: thin tables of hooks."""
