"""What one may ask of SAEs that are made here."""
