"""Programs: the code in Triton; imports Triton, and is imported only where a kernel is launched or compiled."""
