"""Where work runs; knows nothing of scans."""
