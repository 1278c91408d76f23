"""The commands, a module each: options in, one library call, a line or a table out."""
