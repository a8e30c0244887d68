"""Files to decoded images: sources, formats, decoders, resizing, packed stores."""
