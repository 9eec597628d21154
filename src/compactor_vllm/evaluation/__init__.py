"""Quality of generated text: tasks that need no download, and their official metrics."""
