"""The commands beside LightningCLI, one file each: parse, call the rooms, print."""
