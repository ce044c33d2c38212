"""What classify.py needs beside the library: data, a ResNet, training, the methods it is compared with, a report."""
