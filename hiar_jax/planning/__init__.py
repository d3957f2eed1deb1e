"""What a job costs on hardware that is not at hand."""
