"""From run directories to tables and plots; reads files only."""
