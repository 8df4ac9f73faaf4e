"""Other people's training code as tasks."""
