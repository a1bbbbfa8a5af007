"""Who watches a criu that holds a tree in its hands, and mends what its death leaves."""
