"""Find: a captured graph in, the sites that can be quantized out, Linear and experts alike."""
