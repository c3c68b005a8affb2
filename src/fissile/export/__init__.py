"""What leaves the run folder: artifacts, and the proof that they are whole."""
