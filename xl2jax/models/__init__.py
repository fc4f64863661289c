"""The networks of Video-XL-2, one a file. They read and write no files."""
