"""What a run leaves behind for people: its folder, its log, its report, and its lines on the terminal."""
