"""What one node can do with its pods' limiters."""
