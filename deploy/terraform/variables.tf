variable "name" {
  description = "Prefix of every resource's name."
  type        = string
  default     = "inferflux"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "name: lower-case letters, digits and hyphens, 2 to 31 characters, the first a letter."
  }
}

variable "region" {
  description = "AWS region."
  type        = string
  default     = "eu-central-1"
}

variable "instance_type" {
  description = "Machine size. c7i.2xlarge serves small models on CPUs, g6.xlarge has one GPU of 24 GB."
  type        = string
  default     = "c7i.2xlarge"
}

variable "ami_id" {
  description = "Machine image. Null: Ubuntu 24.04 for a CPU machine; for a GPU machine an AWS Deep Learning Base image, which has the driver."
  type        = string
  default     = null
}

variable "gpu" {
  description = "Whether instance_type has a GPU; chooses the machine image."
  type        = bool
  default     = false
}

variable "disk_gb" {
  description = "Size of the encrypted root disk: the system, the environment, the models and the NVMe KV file."
  type        = number
  default     = 100

  validation {
    condition     = var.disk_gb >= 30 && var.disk_gb <= 16384
    error_message = "disk_gb: 30 to 16384."
  }
}

variable "subnet_id" {
  description = "Subnet to start in. Null: one of the default VPC's."
  type        = string
  default     = null
}

variable "public_ip" {
  description = "Whether the machine gets a public address."
  type        = bool
  default     = true
}

variable "allowed_cidrs" {
  description = "Networks that may call the API."
  type        = list(string)

  validation {
    condition     = length(var.allowed_cidrs) > 0 && alltrue([for cidr in var.allowed_cidrs : can(cidrhost(cidr, 0))])
    error_message = "allowed_cidrs: at least one network, such as [\"203.0.113.7/32\"]."
  }
}

variable "port" {
  description = "Port of the API."
  type        = number
  default     = 8080

  validation {
    condition     = var.port >= 1024 && var.port <= 65535
    error_message = "port: 1024 to 65535 (the server runs without privileges)."
  }
}

variable "package" {
  description = "What pip installs: a wheel's URL, or a git URL of this repository (git+https://...). No index has InferFlux."
  type        = string
}

variable "model_bucket" {
  description = "S3 bucket with model folders; null: the demo model answers."
  type        = string
  default     = null
}

variable "model_prefix" {
  description = "Folder in model_bucket to serve, such as models/SmolLM2-135M-Instruct."
  type        = string
  default     = ""

  validation {
    condition     = can(regex("^[A-Za-z0-9._/-]*$", var.model_prefix))
    error_message = "model_prefix: letters, digits and . _ / -"
  }
}

variable "model_id" {
  description = "The name callers use for the model."
  type        = string
  default     = "default"

  validation {
    condition     = can(regex("^[A-Za-z0-9][A-Za-z0-9._:/-]*$", var.model_id))
    error_message = "model_id: letters, digits and . _ : / - (the first a letter or digit)."
  }
}

variable "api_keys" {
  description = "Keys in the form of INFERFLUX_API_KEYS (key:scope+scope,...). Null: one is generated; see the output api_key."
  type        = string
  default     = null
  sensitive   = true
}

variable "policy_passphrase" {
  description = "Passphrase of the policy store. Null: generated."
  type        = string
  default     = null
  sensitive   = true
}

variable "tls_cert_pem" {
  description = "Certificate chain in PEM; null: plain HTTP (keep allowed_cidrs private, or put a load balancer with TLS in front)."
  type        = string
  default     = null
}

variable "tls_key_pem" {
  description = "Private key in PEM for tls_cert_pem."
  type        = string
  default     = null
  sensitive   = true
}

variable "tags" {
  description = "Further tags of every resource."
  type        = map(string)
  default     = {}
}
