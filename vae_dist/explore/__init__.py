"""A local page to play with a trained model: sliders, a drawing pad, and the way between two test images."""
