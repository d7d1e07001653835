"""Where weights come from: names, files of three formats, and the way to their devices."""
