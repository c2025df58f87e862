"""What workers are asked for while and when their requests are answered, many requests at once."""
