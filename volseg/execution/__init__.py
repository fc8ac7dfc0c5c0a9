"""Running work in one process: CPU, memory, threads and time; independent of scans."""
