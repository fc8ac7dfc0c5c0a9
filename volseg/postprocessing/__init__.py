"""Mask → mask, and mask → numbered lesions. Pure: nothing here touches the disk."""
