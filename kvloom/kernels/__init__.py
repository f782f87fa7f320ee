"""The arithmetic of attention and packing. One signature each; `reference` is plain torch and runs anywhere."""
