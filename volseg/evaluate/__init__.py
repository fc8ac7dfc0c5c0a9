"""Reference and prediction → numbers. Pure: nothing here touches the disk."""
