"""What a fit will take, before anything is trained."""
