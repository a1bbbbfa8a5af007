"""Where a tree arrives: its session, its images, its restore."""
