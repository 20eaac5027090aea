"""The typed configuration of a run; nothing here reads files or starts anything."""
