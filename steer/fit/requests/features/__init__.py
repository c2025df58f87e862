"""What one may ask about the features of an SAE: a request each, which is also a command's options
and a job's parameters."""
