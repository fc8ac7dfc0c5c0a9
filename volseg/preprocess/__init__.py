"""Volume → network input and the way back. Pure: nothing here touches the disk."""
