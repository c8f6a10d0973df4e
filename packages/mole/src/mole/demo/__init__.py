"""The demonstration: small trained models, the script that trained them, and the main job."""
