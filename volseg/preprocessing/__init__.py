"""Volume → network input, and its inverse. Pure: nothing here touches the disk."""
