"""The version of tracequant, declared here alone."""

VERSION = "0.1.0"
