"""Demo: the main job, done on a real model."""
