"""Scan and numbered lesions → numbers. Pure: nothing here touches the disk."""
