"""What every other package stands on: the console, files, paths, devices."""
