"""The command `convlora`: thin over the library."""
