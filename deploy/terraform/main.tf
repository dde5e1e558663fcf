# One machine that serves InferFlux: its network rules, its role, its secrets and its start-up.
#
#   terraform -chdir=deploy/terraform init
#   terraform -chdir=deploy/terraform apply -var 'allowed_cidrs=["203.0.113.7/32"]' -var package=URL

locals {
  has_model = var.model_bucket != null
  has_tls   = var.tls_cert_pem != null && nonsensitive(var.tls_key_pem != null)
  api_keys  = coalesce(var.api_keys, "sk-${random_password.api_key.result}:generate+read+admin")
  # Read by the machine at each start of the service, and never part of its user data.
  secrets = {
    INFERFLUX_API_KEYS          = local.api_keys
    INFERFLUX_POLICY_PASSPHRASE = coalesce(var.policy_passphrase, random_password.policy.result)
    TLS_KEY_PEM                 = var.tls_key_pem
  }
  secret_names = concat(["INFERFLUX_API_KEYS", "INFERFLUX_POLICY_PASSPHRASE"], local.has_tls ? ["TLS_KEY_PEM"] : [])
}

resource "random_password" "api_key" {
  length  = 43
  special = false
}

resource "random_password" "policy" {
  length  = 43
  special = false
}

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

data "aws_subnets" "default" {
  count = var.subnet_id == null ? 1 : 0

  filter {
    name   = "default-for-az"
    values = ["true"]
  }
}

data "aws_subnet" "chosen" {
  id = var.subnet_id != null ? var.subnet_id : sort(data.aws_subnets.default[0].ids)[0]
}

data "aws_ssm_parameter" "image" {
  name = (
    var.gpu
    ? "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
    : "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
  )
}

resource "aws_security_group" "server" {
  name_prefix = "${var.name}-"
  description = "The InferFlux API"
  vpc_id      = data.aws_subnet.chosen.vpc_id

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_ingress_rule" "api" {
  for_each = toset(var.allowed_cidrs)

  security_group_id = aws_security_group.server.id
  description       = "API"
  cidr_ipv4         = strcontains(each.value, ":") ? null : each.value
  cidr_ipv6         = strcontains(each.value, ":") ? each.value : null
  from_port         = var.port
  to_port           = var.port
  ip_protocol       = "tcp"
}

resource "aws_vpc_security_group_egress_rule" "web" {
  for_each = { for pair in setproduct(["0.0.0.0/0", "::/0"], [80, 443]) : "${pair[0]}-${pair[1]}" => { cidr = pair[0], port = pair[1] } }

  security_group_id = aws_security_group.server.id
  description       = "System packages, Python packages, models and secrets"
  cidr_ipv4         = strcontains(each.value.cidr, ":") ? null : each.value.cidr
  cidr_ipv6         = strcontains(each.value.cidr, ":") ? each.value.cidr : null
  from_port         = each.value.port
  to_port           = each.value.port
  ip_protocol       = "tcp"
}

resource "aws_ssm_parameter" "secret" {
  for_each = toset(local.secret_names)

  name  = "/${var.name}/${each.key}"
  type  = "SecureString"
  value = local.secrets[each.key]
}

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "server" {
  statement {
    sid       = "OwnSecrets"
    actions   = ["ssm:GetParameter"]
    resources = ["arn:${data.aws_partition.current.partition}:ssm:${var.region}:${data.aws_caller_identity.current.account_id}:parameter/${var.name}/*"]
  }

  dynamic "statement" {
    for_each = local.has_model ? [var.model_bucket] : []

    content {
      sid       = "ReadModel"
      actions   = ["s3:GetObject"]
      resources = ["arn:${data.aws_partition.current.partition}:s3:::${statement.value}/${var.model_prefix}*"]
    }
  }

  dynamic "statement" {
    for_each = local.has_model ? [var.model_bucket] : []

    content {
      sid       = "ListModel"
      actions   = ["s3:ListBucket"]
      resources = ["arn:${data.aws_partition.current.partition}:s3:::${statement.value}"]

      condition {
        test     = "StringLike"
        variable = "s3:prefix"
        values   = ["${var.model_prefix}*"]
      }
    }
  }
}

resource "aws_iam_role" "server" {
  name_prefix        = "${var.name}-"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy" "server" {
  role   = aws_iam_role.server.id
  policy = data.aws_iam_policy_document.server.json
}

# Shell access goes through Session Manager; no port is open for SSH.
resource "aws_iam_role_policy_attachment" "session_manager" {
  role       = aws_iam_role.server.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "server" {
  name_prefix = "${var.name}-"
  role        = aws_iam_role.server.name
}

resource "aws_instance" "server" {
  ami                         = coalesce(var.ami_id, data.aws_ssm_parameter.image.insecure_value)
  instance_type               = var.instance_type
  subnet_id                   = data.aws_subnet.chosen.id
  vpc_security_group_ids      = [aws_security_group.server.id]
  iam_instance_profile        = aws_iam_instance_profile.server.name
  associate_public_ip_address = var.public_ip
  user_data_replace_on_change = true

  user_data = templatefile("${path.module}/templates/cloud-init.yaml.tftpl", {
    unit = indent(6, file("${path.module}/templates/inferflux.service"))
    fetch_secrets = indent(6, templatefile("${path.module}/templates/fetch-secrets.sh.tftpl", {
      name    = var.name
      region  = var.region
      secrets = local.secret_names
    }))
    config = indent(6, templatefile("${path.module}/templates/server.yaml.tftpl", {
      port      = var.port
      has_model = local.has_model
      model_id  = var.model_id
      has_tls   = local.has_tls
    }))
    tls_cert = local.has_tls ? indent(6, var.tls_cert_pem) : ""
    package  = var.package
    model    = local.has_model ? "s3://${var.model_bucket}/${var.model_prefix}" : ""
    region   = var.region
  })

  root_block_device {
    volume_type = "gp3"
    volume_size = var.disk_gb
    encrypted   = true
  }

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  lifecycle {
    # A newer image of the day must not replace a running server.
    ignore_changes = [ami]

    precondition {
      condition     = (var.tls_cert_pem == null) == (var.tls_key_pem == null)
      error_message = "tls_cert_pem and tls_key_pem go together."
    }
  }

  tags = { Name = var.name }

  depends_on = [aws_ssm_parameter.secret, aws_iam_role_policy.server]
}
