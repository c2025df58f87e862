"""What fits of lenses are asked with."""
