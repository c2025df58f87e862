"""Labels of SAE features in the wild, one foreign layout a file; `reading` tells them apart."""
