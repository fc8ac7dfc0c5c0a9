"""The only place that knows file formats; each module reads or writes one family of files."""
