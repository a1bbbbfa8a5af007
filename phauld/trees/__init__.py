"""The trees of this node: started, recorded, held back, stopped."""
