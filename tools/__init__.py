"""What installs, and writes what is generated."""
