"""Pure: protocols and formats as bytes in, events out."""
