"""What any program needs: errors, processes, signals, metrics, video files."""
