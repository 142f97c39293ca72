"""Work that is limited and can be stopped: threads that notice that nobody waits for them, and child processes."""
