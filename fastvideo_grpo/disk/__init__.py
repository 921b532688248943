"""Files that must not be lost, and disks that are full or broken."""
