"""The commands of `hetero-sd`, each in a file of its own."""
